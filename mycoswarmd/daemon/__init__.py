"""The process shell: settings, wiring, supervision, reload."""
