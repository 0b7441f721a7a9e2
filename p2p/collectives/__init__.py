"""Allreduce over shards: schedules are data (`ring`, `butterfly`), one executor runs them all."""
