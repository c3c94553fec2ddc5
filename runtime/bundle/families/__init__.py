"""What a model family is: one record for each, which all of the house asks."""
