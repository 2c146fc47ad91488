"""Records with what tells of them, and what is done with them later."""
