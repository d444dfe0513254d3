"""Networks of a photo team that has never heard of sparknorm."""
