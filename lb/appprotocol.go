package lb

import (
	"fmt"
	"strings"
)

// MaxAppProtocol bounds a stored appProtocol, in bytes: a DNS subdomain, a slash, and a label as Kubernetes has them.
const MaxAppProtocol = 253 + 1 + 63

// appProtocols are the names that are known: Kubernetes' own (https://kubernetes.io/docs/concepts/services-networking/service/#application-protocol),
// what meshes made customary, and those of IANA's registry (https://www.iana.org/assignments/service-names-port-numbers)
// that services commonly have and that are not HTTP in the clear.
var appProtocols = map[string]AppProtocol{
	"http": AppHTTP, "http-alt": AppHTTP, "kubernetes.io/ws": AppHTTP, "ws": AppHTTP, "grpc-web": AppHTTP,
	"kubernetes.io/h2c": AppHTTP2, "h2c": AppHTTP2, "http2": AppHTTP2, "grpc": AppHTTP2,
	"https": AppTCP, "tls": AppTCP, "tcp": AppTCP, "kubernetes.io/wss": AppTCP, "wss": AppTCP,
	"amqp": AppTCP, "amqps": AppTCP, "cassandra": AppTCP, "domain": AppTCP, "dns": AppTCP, "ftp": AppTCP, "imap": AppTCP, "imaps": AppTCP,
	"kafka": AppTCP, "ldap": AppTCP, "ldaps": AppTCP, "memcache": AppTCP, "memcached": AppTCP, "mongo": AppTCP, "mongodb": AppTCP,
	"mqtt": AppTCP, "mysql": AppTCP, "nats": AppTCP, "postgres": AppTCP, "postgresql": AppTCP, "redis": AppTCP, "sip": AppTCP, "smtp": AppTCP,
	"smtps": AppTCP, "ssh": AppTCP, "xmpp-client": AppTCP, "zookeeper": AppTCP,
}

// ParseAppProtocol returns what a port with that appProtocol speaks; upper and lower case are the same, as in IANA's registry
// (RFC 6335 section 5.1). What isn't known is found out from each connection.
func ParseAppProtocol(s string) AppProtocol { return appProtocols[strings.ToLower(s)] }

func checkAppProtocol(p ServicePort) error {
	if len(p.AppProtocol) > MaxAppProtocol {
		return fmt.Errorf("port %d/%s: appProtocol %s has %d bytes, at most %d are allowed", p.Port, p.Protocol, quote(p.AppProtocol), len(p.AppProtocol), MaxAppProtocol)
	}
	return nil
}
