"""What spark-submit.sh ships to a cluster: our code, the Python packages that jobs import, and Spark's jars."""
