package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"time"
)

// NewRequest makes a key, and a request for a certificate for it, both PEM.
func NewRequest() (request, key []byte, err error) {
	made, err := newKey()
	if err != nil {
		return nil, nil, err
	}
	// The subject is the signer's to say; an empty one shows that.
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{}}, made)
	if err != nil {
		return nil, nil, fmt.Errorf("pki: make a request for a certificate: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(made)
	if err != nil {
		return nil, nil, errors.New("pki: a new private key cannot be written")
	}
	return encode(pemRequest, der), encode(pemKey, keyDER), nil
}

// Sign makes a certificate for the key of a PKCS #10 request (PEM), which proves that its sender has the key. Nothing else
// of the request is used: who it is for is the signer's to say. The key must be on P-256, as [NewRequest] makes it.
func (a *Authority) Sign(request []byte, r Request, now time.Time) (cert []byte, err error) {
	der, err := block(request, "request for a certificate", pemRequest)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("pki: request for a certificate: %w", err)
	}
	key, ok := parsed.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("pki: request for a certificate: want an ECDSA key on P-256")
	}
	if err := parsed.CheckSignature(); err != nil {
		return nil, fmt.Errorf("pki: request for a certificate: its sender does not have the key that it asks a certificate for: %w", err)
	}
	return a.issue(key, r, now)
}
