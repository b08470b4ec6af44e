"""Attribution patching: every cell estimated from two forwards and one backward."""
