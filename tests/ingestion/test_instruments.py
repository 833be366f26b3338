"""The table of names."""

from ingestion.instruments import INSTRUMENTS, NAME


def test_names_fit_the_contract_and_mean_one_asset_each() -> None:
    for instruments in INSTRUMENTS.values():
        symbols = [instrument.symbol for instrument in instruments.values()]
        assert len(set(symbols)) == len(symbols)
        for asset, instrument in instruments.items():
            assert instrument.asset == asset == asset.lower()
            assert NAME.fullmatch(asset)
            assert NAME.fullmatch(instrument.symbol)


def test_the_same_asset_has_each_venues_own_name() -> None:
    assert [INSTRUMENTS[venue]["bitcoin"].symbol for venue in ("binance", "coinbase", "kraken", "coincap")] == [
        "BTCUSDT",
        "BTC-USD",
        "BTC/USD",
        "bitcoin",
    ]
    assert len(INSTRUMENTS["binance"]) >= 20
