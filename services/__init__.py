"""Kafka, HDFS, YARN and the Spark Thrift Server as single real nodes on this machine's loopback."""
