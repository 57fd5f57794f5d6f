"""The workflow: stages, the graph that joins them, recipes, the command line and the reports."""
