"""What a call may ask, checked and spread over its images before anything is computed."""
