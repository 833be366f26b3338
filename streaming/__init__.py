"""Jobs that never end; run by spark-submit."""
