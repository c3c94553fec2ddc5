"""What a report shows of a document."""
