"""Kafka, HDFS, YARN and the Spark Thrift Server as single real nodes on this machine's loopback."""

from services.control import NAMES, down, states, up
from services.errors import ServiceError

__all__ = ["NAMES", "ServiceError", "down", "states", "up"]
