package lb

import "testing"

func TestParseAppProtocol(t *testing.T) {
	for s, want := range map[string]AppProtocol{
		"": AppUnknown, "http": AppHTTP, "HTTP": AppHTTP, "kubernetes.io/ws": AppHTTP,
		"kubernetes.io/h2c": AppHTTP2, "grpc": AppHTTP2, "http2": AppHTTP2, "h2c": AppHTTP2,
		"https": AppTCP, "tls": AppTCP, "tcp": AppTCP, "kubernetes.io/wss": AppTCP, "redis": AppTCP, "mysql": AppTCP, "postgresql": AppTCP, "mongo": AppTCP,
		"example.com/ours": AppUnknown, "http/1.1": AppUnknown,
	} {
		if got := ParseAppProtocol(s); got != want {
			t.Errorf("%q is %q, want %q", s, got, want)
		}
	}
}
