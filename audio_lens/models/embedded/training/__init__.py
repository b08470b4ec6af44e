"""How the embedded model is made, measured and given its clips. It is no part of the wheel."""
