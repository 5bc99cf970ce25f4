"""What runs inside the cage. Imports only wire and the standard library."""
