"""Figures for papers and pages: numbers in; lines, bars and grids as SVG that needs no other program out."""
