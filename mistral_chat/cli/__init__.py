"""The command line: flags, the prompt, what is shown. Runs before anything heavy is imported."""
