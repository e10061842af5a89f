"""What the chapters, the records and the reports of the O2CAP Book need."""
