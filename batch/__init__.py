"""Jobs that end; run by spark-submit."""
