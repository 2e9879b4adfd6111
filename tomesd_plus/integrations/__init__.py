"""Plug-ins for other libraries; each is a module to import by itself."""
