"""Floor 6: one process that people and programs can rely on: HTTP APIs, a queue that loses nothing, a web page.

The front (this process) speaks HTTP, keeps the queue on disk and never imports torch, so that it answers while the
device is busy. What draws is behind a :class:`~sumuk.serve.backend.Backend`: a worker process here, or replicas of a
Ray cluster. Between them go the plain values of :mod:`~sumuk.serve.wire`.
"""
