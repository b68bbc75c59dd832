"""Every private name of another library that is used here, one module a library, behind a public name of ours.

Each entry says why it is needed and which versions it was read and tested with; ``tests/compat`` fails by name where a
new version changes it. Nothing outside of this package may use such a name (``tests/test_imports.py``).
"""
