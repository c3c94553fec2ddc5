"""What all commands have in common: start, options, errors, exit statuses, standard error."""
