"""What can be run: each module is one question, asked once per case."""
