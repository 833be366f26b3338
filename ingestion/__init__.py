"""From a venue's WebSocket to Kafka."""
