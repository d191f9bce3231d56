"""What reports are written with: pictures, tables and pages."""
