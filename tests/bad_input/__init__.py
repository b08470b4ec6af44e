"""Input that cannot be used, and what is said to it.

Every case is tried as users run the library, without the checks of types that tests switch on: in a
process of its own, ``python tests/bad_input`` (from the root), which prints what became of each.
With ``--write`` it renews the table of docs/bad_input.md.
"""
