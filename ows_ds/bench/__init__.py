"""The verb `bench`: methods side by side. `quality` trains them; each other table has a module of its own."""
