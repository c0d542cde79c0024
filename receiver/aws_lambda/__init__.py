"""The receiver on AWS Lambda. Handler: `receiver.aws_lambda.receive.handler`."""
