"""What every run consists of: errors, taps, teacher, terms, distiller; torch and fvcore only."""
