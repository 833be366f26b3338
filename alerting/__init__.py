"""Alerts as they happen: Kafka's topic of ticks in, topic `alerts` and the log out. Nothing here waits for the lake."""
