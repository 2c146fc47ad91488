"""A photo from its bytes to a record."""
