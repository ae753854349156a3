"""Reading run files: averages with intervals, comparisons, figures, pages."""
