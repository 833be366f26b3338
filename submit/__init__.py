"""What spark-submit.sh has beside a job.

For a cluster: our code, the Python packages that jobs import, and Spark's jars. For a driver here: their classes.
"""
