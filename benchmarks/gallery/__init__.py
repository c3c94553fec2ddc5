"""A page of pictures, one for each option."""
