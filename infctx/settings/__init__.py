"""Every setting of a run, by section of the YAML file: its type, its unit, what it does and what it costs.

tools/settings_page.py turns the docstrings into docs/settings.md; load.py reads a configuration.
"""
