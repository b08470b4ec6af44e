"""Measurements that anybody can repeat; each module is one command."""
