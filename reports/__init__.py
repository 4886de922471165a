"""Everything that looks at runs that have ended, and at data files. Nothing that trains depends on it."""
