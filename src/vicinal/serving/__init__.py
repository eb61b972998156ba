"""What leaves the house: exports that other libraries load."""
