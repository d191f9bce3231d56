"""What every run is made of: errors, taps, teacher, terms, distiller; torch and fvcore only."""
