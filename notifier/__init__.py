"""Sends alerts from Kafka to a webhook and by e-mail. No Spark, no tables."""
