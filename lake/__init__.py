"""What the data is: tables, the transforms between them, and the one way to write them."""
