"""
Fuzz targets for everything that reads a client's or upstream's bytes: C{make fuzz}.
"""
