"""Live alerts, from Kafka's topic of ticks to topic `alerts` and standard output, without waiting for the lake."""
