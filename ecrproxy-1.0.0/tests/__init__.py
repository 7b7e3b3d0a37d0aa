"""The tests of ecrproxy, and the stand-in for ECR they share."""
