"""Orchestration only: the Prefect flows, their cached tasks, the local server and the command line."""
