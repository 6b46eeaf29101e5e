"""Orchestration: the Prefect flows, their cached tasks, the local server and the command line."""

from flows import environment

environment.configure_libraries()  # before any of them is imported, by whichever way a flow is started
