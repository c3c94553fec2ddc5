"""What runs a bundle's graphs: a file or folder for each engine library, and the choice between them."""
