"""What rankers cost and reach, for readers: plots and the HTML report."""
