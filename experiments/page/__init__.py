"""What the demo and the reproduction share: tables for the terminal, figures and pages in two
themes."""
