"""What launcher and job agree on. Pure: no I/O, no clock, no environment; pydantic and the standard library only."""
