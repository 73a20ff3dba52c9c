"""The figures of tools/plot.py, by what they show."""
